"""Five small language models, tuned to answer differently, served from too little memory."""
