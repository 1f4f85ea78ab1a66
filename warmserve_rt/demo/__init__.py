"""The demo: five small language models with different tunings, served from too little memory."""
