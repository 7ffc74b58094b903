"""riverrun: sequence models with a fixed-size state, trained in parallel, run in constant memory."""

__version__ = "0.1.0"
