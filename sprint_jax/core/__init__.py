"""Code that every room may use and that knows no room: errors, configs, command lines, files, pictures."""
