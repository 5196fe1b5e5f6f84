"""distsampler."""
