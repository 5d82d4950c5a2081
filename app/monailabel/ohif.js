// Settings of the OHIF viewer that MONAI Label carries, in place of its own.

// MONAI Label's panel would ask port 8000, whatever the page's own port is.
document.cookie = `MONAILABEL_SERVER_URL=${escape(`${location.origin}/`)}`;

// A button of the segmentation panel's tools; its radius and shape are set below it.
const brush = (id, icon, circle, sphere) => ({
  id,
  icon,
  label: id,
  evaluate: { name: 'evaluate.cornerstone.segmentation', toolNames: [circle, sphere] },
  options: [
    {
      id: `${id}-radius`,
      name: 'Radius (mm)',
      type: 'range',
      min: 0.5,
      max: 50,
      step: 0.5,
      value: 5,
      commands: { commandName: 'setBrushSize', commandOptions: { toolNames: [circle, sphere] } },
    },
    {
      id: `${id}-shape`,
      name: 'Shape',
      type: 'radio',
      value: circle,
      values: [
        { value: circle, label: 'Circle' },
        { value: sphere, label: 'Sphere' },
      ],
      commands: 'setToolActiveToolbar',
    },
  ],
});

const correctionTools = [
  {
    id: 'BrushTools',
    uiType: 'ohif.buttonGroup',
    props: {
      groupId: 'BrushTools',
      items: [
        brush('Brush', 'icon-tool-brush', 'CircularBrush', 'SphereBrush'),
        brush('Eraser', 'icon-tool-eraser', 'CircularEraser', 'SphereEraser'),
      ],
    },
  },
  {
    id: 'Shapes',
    uiType: 'ohif.radioGroup',
    props: {
      icon: 'icon-tool-shape',
      label: 'Shapes',
      evaluate: {
        name: 'evaluate.cornerstone.segmentation',
        toolNames: ['CircleScissor', 'SphereScissor', 'RectangleScissor'],
      },
      options: [
        {
          id: 'shape-mode',
          name: 'Shape',
          type: 'radio',
          value: 'CircleScissor',
          values: [
            { value: 'CircleScissor', label: 'Circle' },
            { value: 'SphereScissor', label: 'Sphere' },
            { value: 'RectangleScissor', label: 'Rectangle' },
          ],
          commands: 'setToolActiveToolbar',
        },
      ],
    },
  },
];

// Export of OHIF's segmentation panel. The command that it calls needs to be told the server and is not; the one that
// tells it shows the result in a way that fails in a view of three planes.
const storeOnServer = (commandsManager, extensionManager, uiNotificationService) => async (given) => {
  const [dataSource] = extensionManager.getActiveDataSource();
  const say = (type, message) => uiNotificationService.show({ title: 'DICOM SEG', message, type, duration: 8000 });
  try {
    const stored = await commandsManager.runCommand('storeSegmentation', { ...given, dataSource }, 'SEGMENTATION');
    if (stored) {
      say('success', 'Stored on the DICOMweb server');
    }
  } catch (error) {
    say('error', `Not stored: ${error.message || 'the DICOMweb server refuses it'}`);
  }
};

// MONAI Label's mode has no button that hands a segmentation in, and names correction tools that it does not bring.
// OHIF's own segmentation panel beside it does both.
let extensions;
const submission = {
  id: 'medseg-submission',
  preRegistration: ({ extensionManager }) => {
    extensions = extensionManager;
  },
  onModeEnter: ({ servicesManager, commandsManager }) => {
    if (location.pathname.endsWith('/monai-label')) {
      const { panelService, toolbarService, uiNotificationService } = servicesManager.services;
      toolbarService.addButtons(correctionTools);
      panelService.addPanel('right', '@ohif/extension-cornerstone.panelModule.panelSegmentationWithTools');
      commandsManager.createContext('MEDSEG'); // of commands of one name OHIF takes that of the youngest context
      commandsManager.registerCommand('MEDSEG', 'storeSegmentation', {
        commandFn: storeOnServer(commandsManager, extensions, uiNotificationService),
      });
    }
  },
};

window.config = {
  routerBasename: '/ohif/',
  showStudyList: true,
  modes: [],
  extensions: [submission],
  showWarningMessageForCrossOrigin: true,
  showCPUFallbackMessage: true,
  showLoadingIndicator: true,
  strictZSpacingForVolumeViewport: true,
  useSharedArrayBuffer: 'FALSE',
  defaultDataSourceName: 'dicomweb',
  dataSources: [
    {
      namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
      sourceName: 'dicomweb',
      configuration: {
        friendlyName: 'DICOMweb server',
        name: 'dicomweb',
        wadoUriRoot: '/proxy/dicom/wado',
        qidoRoot: '/proxy/dicom/qido',
        wadoRoot: '/proxy/dicom/wado',
        qidoSupportsIncludeField: true,
        supportsReject: false,
        imageRendering: 'wadors',
        thumbnailRendering: 'wadors',
        enableStudyLazyLoad: false,
        supportsFuzzyMatching: false,
        supportsWildcard: true,
        bulkDataURI: { enabled: true },
      },
    },
  ],
};
