"""What stages read of the decoder: attention, keys, values and states, without eager attention.

Belongs here: how a layer is asked (`attention_tap`, `look_ahead`), what is made of it (`from_layer`), and when
(`decoder_reads`). A new read of the decoder is a class in `core/reads/decoder.py` and its value in `from_layer`.
"""
