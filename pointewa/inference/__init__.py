"""What is done with a trained model: predict, evaluate, export."""
