"""Sweeps: many runs at once, over checkpoints, restrictions, settings and data sets.

In reading order:

``sweep``        ``sweep()``: checks what is asked for, then runs every cell
``plan``         a request becomes a plan: every mistake is reported before anything starts
``cells``        the grid of labels, and the cells in it with their names and seeds
``checkpoints``  weights looked up as files, folders of steps or by name, read and checked
``hub``          those that are revisions on the Hugging Face Hub, and the cache of the node
``keys``         the names that a checkpoint has for the model's tensors
``manifest``     sweep.json and cell.json: what is kept beside the runs
``scheduler``    runs cells in threads, as far as there are places
``fleet``        the places that cells share, and how many each has
``warm_start``   what the first checkpoint's calibration hands to the others of its row
``results``      ``Sweep``: the table of all estimates, read from the directory
``recipe``       from a YAML file to a request
"""
