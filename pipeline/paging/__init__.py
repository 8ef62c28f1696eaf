"""Bytes on their way to and from the disk, past the page cache: engines, the spool, and hidden states kept there."""
