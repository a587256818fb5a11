"""Which strategy to use for a task, learned from recorded performance; and the records that it is learned from.

Pure: plain data and arrays in, plain data and arrays out; no clock, no files, no network (node/history.py keeps the
records). No prompts, no token ids, no peer ids. Importing this package loads neither numpy nor scikit-learn: its
modules do, so that only who chooses pays for it.
"""
