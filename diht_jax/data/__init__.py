"""The public API for records, TFRecords, the tokenizer and the index of a data set."""
