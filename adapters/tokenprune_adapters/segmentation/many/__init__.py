"""Many images in one run: pictures are read ahead, towers and the decoder run over batches of several images.

Belongs here: everything that concerns more than one image at a time. The steps for one image are in the folder above.
"""
