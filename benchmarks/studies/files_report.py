def report(rows, own, rival): return str(len(rows))
def draw(rows, path): pass
