"""Random access to images and captions: folders, tars, records, TFDS."""
