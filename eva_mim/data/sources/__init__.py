"""Sources of images: folders, shards, lists and drawn scenes; the indexes of their records, decoding, and files by URL."""
