"""The live shell: facts come in, turns are taken and made durable, commands go out to the engines."""
