"""The public door to records, TFRecords, the tokenizer and the index of a data set."""
