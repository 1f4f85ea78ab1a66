"""Show the result of a study on the terminal and as HTML."""
