"""trinorm in other libraries, each in a module of its own: ``trinorm.integrations.transformers``."""
