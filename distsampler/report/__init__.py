"""Report: what people see of runs and sweeps, read from their stores; needs neither torch nor Ray.

In reading order:

``summary``       what is said about a run or a sweep, as tables, lines and JSON
``plots``         figures on matplotlib Axes, of what ``subjects`` accepts; ``curves``: their series
``html``          one page that needs nothing else, with figures in its own colours
``run_report``    the page about a run
``sweep_report``  the page about a sweep
``listing``       the runs in a folder (``ls``)
``watch``         a run that another process drives, followed to its end
``guide``         pages of the guide, shipped with the package
"""
