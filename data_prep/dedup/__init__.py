"""Duplicates out of JSON Lines: exact ones by hash, near ones by MinHash, LSH and an exact Jaccard check.

What is removed, whatever the number of workers:

1. Documents stand in the order of the input: files sorted by path, lines as they come.
2. A document whose text was there before is an exact duplicate and goes; the first stays.
3. Of the others, one goes if and only if an earlier document that stays shares a band with it and the Jaccard
   similarity of their two sets of shingles, counted and not estimated, is at least the threshold. So nothing goes that
   is not similar to something that stays. A bucket remembers its first `max_bucket` staying documents, no more: text
   made from one template, just below the threshold, would else cost the square of its pages. The report counts these.

Five stages, each a module; every part of one is a file below DIR/.work whose name holds a digest of all that it
depends on, so a rerun takes up what is finished and makes anew what an input or a setting has changed:

    signatures   each part of the input: hashes of texts, MinHash bands
    candidates   sorted by hash, a partition at a time: exact duplicates, buckets, and which buckets hang together
    shingles     each part of the input again, only lines in a bucket: their sets of shingles
    verify       buckets that hang together, in the order of documents: Jaccard, keep the first
    write        each file: the lines that stay, byte for byte; then the accounts
"""

from data_prep.dedup.plan import Settings
from data_prep.dedup.run import dedup

__all__ = ["Settings", "dedup"]
