"""The training jobs behind the command line; the library never imports this package."""
