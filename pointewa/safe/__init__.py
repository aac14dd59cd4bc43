"""Reading files of unknown origin. Behind it values are trusted."""
