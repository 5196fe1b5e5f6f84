"""Programs to copy from. Each is run as a file, and finds its neighbours as a program does."""
