"""DGQ as published, simulated in float: the yardstick."""
