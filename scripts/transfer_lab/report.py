def collect(out):
    return []
