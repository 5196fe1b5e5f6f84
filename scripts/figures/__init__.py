"""The pictures of README and guide, and ``step_size``, which makes one that no benchmark does."""
