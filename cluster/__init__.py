"""The `secateur` command, and what runs `pipeline` over many machines."""
