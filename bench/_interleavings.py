def interleavings(*a):
    pass
