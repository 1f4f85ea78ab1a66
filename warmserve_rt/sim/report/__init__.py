"""A study's result on the terminal and as HTML."""
