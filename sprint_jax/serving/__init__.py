"""Pictures for people who wait: a page to draw on, its frames, an HTTP API, and the worker behind them."""
