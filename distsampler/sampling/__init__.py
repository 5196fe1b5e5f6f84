"""Sampling: the room where model, data, cluster and store come together.

``sample``       the front door: ``sample``, ``resume`` and ``start``; start reading there
``prepare``      checks model, data, loss and config against each other, and has them tried
``piloted``      a run without lr, whose step short pilots choose
``job``          runs what was checked: store, places, driver, gate
``directory``    where a run may begin, and what a directory names, before it is imported
``gate``         judges at the end of each gate round, and chooses the burn-in
``packing``      settles how many chains advance together
``fingerprint``  what the bits depend on, so that a run is continued only as it began
``stopping``     signals and time limits; ``handle``: a run in a thread
``calibration``  chooses sampler, step and length: ``tuning`` decides from short ``pilots``
"""
