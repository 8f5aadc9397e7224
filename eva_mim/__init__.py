"""eva-mim: frozen vision teachers into students by masked feature prediction. Importing it does nothing."""

__version__ = "0.1.0"
