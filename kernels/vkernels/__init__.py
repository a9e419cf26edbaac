"""vkernels"""
