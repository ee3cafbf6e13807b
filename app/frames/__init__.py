"""What the pages, the report and the command line show, as frames: one file per view, each function run -> frame.

Nothing here draws, and nothing here knows SQL: frames read tables of a :class:`store.Run` and call the formulas of
``profiler.metrics``. Every frame keeps its columns when it is empty.
"""
