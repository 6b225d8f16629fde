"""Every experiment of the paper as data, a runner for them and a report."""
