"""What starts workers on a site's machines; every engine keeps the contract in ``ports.Engine``."""
