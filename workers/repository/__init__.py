"""The repository: a log-structured, copy-on-write store of recovery points. docs/REPOSITORY.md has every byte.

    decisions   one object per epoch: the manifest that publishes it, or the tombstone that ends it (decisions)
      roots     a disk at one epoch: segment -> its newest map, in pages that are inherited where untouched (root)
        maps    a segment: block -> the run that holds it, by pack, offset and digest (segment_map)
          packs immutable objects of runs and maps, one a work unit (pack)
    keyring     who may read: a key for each object, derived from wrapped data keys (keyring)
    store       where the objects are: a directory or S3 (store)

Nothing in it is trusted: every length and offset is checked, every run, map, page and manifest has a digest.
"""
