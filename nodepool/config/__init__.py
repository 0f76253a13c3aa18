"""The configuration: YAML in, frozen records or all the errors at once out."""
