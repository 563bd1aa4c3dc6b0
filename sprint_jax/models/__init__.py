"""Networks as pure functions of (params, inputs): no files, no data, no mesh."""
