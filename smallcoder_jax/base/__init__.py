"""The foundation of every other package: reading files and showing text of unknown origin, errors and the terminal."""
