"""What a model remembers, measured: `retention`, `edits` and `integrity`, each a module with a function of its name."""
