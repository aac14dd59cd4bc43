"""What is learned, a module a task."""
