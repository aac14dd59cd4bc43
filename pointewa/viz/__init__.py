"""Pictures. Nothing here is imported before it is asked for."""
