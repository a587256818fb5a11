"""What is learnt from: the record that every finished request leaves, and the features that were known before it ran.

Pure: plain data, no clock, no disk (node/history.py keeps records). No prompts, no token ids, no peer ids in it.
"""
