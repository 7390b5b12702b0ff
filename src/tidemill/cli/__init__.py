"""The command line: thin commands over ``tidemill.sdk``. ``main`` is where it starts."""
