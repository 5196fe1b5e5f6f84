"""scripts/certify-all: ``jobs`` make rows, ``bars`` judge them, ``certify_all`` is the command."""
