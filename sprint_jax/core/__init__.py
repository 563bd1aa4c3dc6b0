"""What every room may use and what knows no room: errors, configs, command lines, files, pictures."""
