"""The one exception tree of moescope.

::

    MoescopeError
    ├── InputError            the user gave something that cannot work        exit code 2
    │   ├── ModelError        no MoE layer, or one that cannot be watched, or a model that does not load
    │   ├── CorpusError       no text, an unreadable file, a missing column
    │   ├── ImportFileError   a file of another engine that is damaged, of another layout, or does not fit the model
    │   ├── StoreError        no such run, not a run, a name that is taken, a schema from another version
    │   ├── MetricError       arguments outside a metric's domain
    │   └── PlanError         a plan that no checkpoint or engine could hold
    └── RunError              the work began and could not be finished          exit code 1
        ├── CaptureError      the profiler could not record what the model did
        └── ShardError        a shard of a run is missing or damaged

Catch ``MoescopeError`` to catch everything that moescope raises on purpose::

    try:
        run = store.open_run("runs/mine.duckdb")
    except MoescopeError as error:
        print(error)

Each message is one line: the thing, the value it had, and what to do.
"""


class MoescopeError(Exception):
    """Everything that moescope raises on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class InputError(MoescopeError):
    """The user gave something that cannot work; nothing was spent yet."""

    exit_code = 2


class ModelError(InputError):
    """The model has no MoE layer, has one that cannot be watched, or does not load."""


class CorpusError(InputError):
    """The corpus is empty, unreadable, or lacks a column."""


class ImportFileError(InputError):
    """A file of another engine is damaged, of another layout than documented, or does not fit the model."""


class StoreError(InputError):
    """A run or a store is missing, is something else, or has a schema of another version."""


class MetricError(InputError):
    """Arguments outside the domain of a metric."""


class PlanError(InputError):
    """A plan that no checkpoint or engine could hold."""


class RunError(MoescopeError):
    """The work began and could not be finished."""


class CaptureError(RunError):
    """The profiler could not record what the model did."""


class ShardError(RunError):
    """A shard of a run is missing or damaged."""
