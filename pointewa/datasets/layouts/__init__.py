"""The data sets, a module each. In a clone these are the files in its folder `datasets/`."""

from pointewa.clone import beside

__path__ += beside("datasets")
