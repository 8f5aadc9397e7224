"""Stored features of frozen networks: files of numbered views of images (`files`), who makes them (`write`), and rows of
summaries as batches (`rows`)."""
