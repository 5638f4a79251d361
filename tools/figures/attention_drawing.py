"""How the figures of the page on attention look."""
def write(data, folder): pass
