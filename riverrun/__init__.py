"""riverrun: sequence models that carry a fixed-size state, trained in parallel and run forever in constant memory."""

__version__ = "0.1.0"
