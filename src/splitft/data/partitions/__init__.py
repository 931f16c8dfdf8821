"""One file per partition; each is a `Partition` of `splitft.data.base`."""
